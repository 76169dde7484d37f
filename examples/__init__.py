"""Runnable stories that show Isthmus at work; they may import every other package."""
