"""The shipped world of moving handwritten digits: one provider of training data, the codec trained on it, and the judge
that reads back from pixels what videos show."""
