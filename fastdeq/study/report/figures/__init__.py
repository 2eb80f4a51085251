"""The pictures of the study, a file per kind: each yields pictures, or why one is missing."""
