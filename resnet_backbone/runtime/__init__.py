"""What any run needs: signals, processes, whole files, built-in pictures."""
