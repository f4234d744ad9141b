"""What every training run needs: checkpoints, data order, signals, console, pictures, processes."""
