"""From annotation and video files to the clips that a model is trained on; and a synthetic data set to try it with."""
