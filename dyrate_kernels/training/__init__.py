"""Training of rate predictors (``dyrate train``), and the search of a layer for ``vtw`` (``dyrate calibrate``). The model is frozen."""
