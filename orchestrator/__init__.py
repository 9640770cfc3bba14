"""Everything that touches the world: Ray, object storage, MLflow, configuration files."""
