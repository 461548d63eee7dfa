"""The LightningModule, the losses of its replicas, and the controls."""
