"""Pages and charts that reports are drawn with; one HTML file each, no script."""
