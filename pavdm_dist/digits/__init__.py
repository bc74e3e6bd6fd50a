"""The shipped world: moving handwritten digits, the codec trained on them, cached clips, and what videos show read back
from their pixels."""
