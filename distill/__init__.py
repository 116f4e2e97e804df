"""Strong-to-weak distillation."""
