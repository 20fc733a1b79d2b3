"""The detection trainer."""
