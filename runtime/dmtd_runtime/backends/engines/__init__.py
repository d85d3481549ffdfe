"""The backend over engines on a device: whole cycles without the host."""
