"""The compression methods, one file each: a weight, a rank and statistics in, two factors out."""
