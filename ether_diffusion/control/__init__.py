"""Drawing under a control: its encoder, the hook through which it acts, and a pipeline."""
