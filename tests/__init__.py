"""Tests in the rooms of the package; `whole` is what crosses rooms, `helpers` what tests share."""
