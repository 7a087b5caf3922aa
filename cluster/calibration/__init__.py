"""What a budget of experts costs in quality: measured with real drafts, written beside the model, asked at start-up."""
