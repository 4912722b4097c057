"""The page of ``dyrate demo``: one picture, unpruned and pruned answers side by side. ``engine`` knows no gradio, ``app`` no model."""
