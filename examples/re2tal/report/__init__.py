"""An evaluation to look at: tables, a timeline, and one self-contained HTML page."""
