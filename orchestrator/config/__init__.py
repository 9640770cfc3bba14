"""YAML and dotted overrides to frozen dataclasses, with errors for people."""
