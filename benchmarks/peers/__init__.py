"""The other side of the speed benchmark: each script runs in an environment of its own, never in alignkit's."""
