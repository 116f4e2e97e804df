"""Recipes, the command line and the bundled handwriting track."""
