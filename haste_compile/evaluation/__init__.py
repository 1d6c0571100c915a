"""How close two videos are, and a page that lets a person judge: metrics, MP4 files, comparison page."""
