"""Ground that the whole package stands on: options of configs, devices and dtypes by name, tables, provenance."""
