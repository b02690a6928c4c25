"""From a trained detector to detections, mAP, and what kind of errors the false detections are."""
