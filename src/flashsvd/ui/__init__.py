"""The browser page: widgets made from the config dataclasses, and jobs in processes of their own."""
