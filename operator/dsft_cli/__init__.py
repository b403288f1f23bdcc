"""The `dsft` command."""
