"""bfsys trains classifiers on raw file bytes, from a laptop to a SLURM cluster."""
