"""Steps from one schema of the database to the next, run by cloud.database with Alembic when a cloud starts."""
