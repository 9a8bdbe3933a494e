"""How good samples are: distances between samples and data, and the features that they are taken in."""
