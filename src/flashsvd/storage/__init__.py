"""Models and their companions as files: finding, checking, reading and writing them."""
