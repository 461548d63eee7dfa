"""The application: Hydra configures it, Lightning trains, MLflow records."""
