"""Networks: tensors in, tensors out. They know neither requests nor trees."""
