"""Connectors to other engines, and what they are made of. Imported as `kvstore.connectors`."""
