"""Linear attention as papers and public code write it, and look-alikes: what the backend makes of each on this machine."""
