"""What any run needs: processes, signals, seeds, whole files, run folders, errors in one line."""
