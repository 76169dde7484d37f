"""Sources of models, each kind read for real."""
