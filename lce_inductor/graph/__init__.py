"""What every stage on FX graphs needs: values, a way back, writing nodes. Knows nothing of heads."""
