"""Methods that change how a checkpoint is written, not what it computes."""
