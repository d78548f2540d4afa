"""TokenReduce for Pebble."""
