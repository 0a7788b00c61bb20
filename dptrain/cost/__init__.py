"""What a run uses: FLOPs, device peaks, energy, money."""
