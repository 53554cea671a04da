"""From what a user writes to the IR: text (`build.py`), and Python functions (`trace.py`)."""
