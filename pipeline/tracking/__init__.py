"""MLflow runs: their content, and a recorder that survives a failing store."""
