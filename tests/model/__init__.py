"""Models in pure Python that the tests compare our types with."""
