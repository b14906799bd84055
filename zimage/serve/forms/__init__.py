"""The forms in which clients ask: each file translates one of them to a request, and the outcome back."""
