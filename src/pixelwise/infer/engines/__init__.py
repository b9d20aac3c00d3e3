"""Who labels the images of a batch: this process (`local`), or the workers of a Ray cluster (`ray`)."""
