"""What a conversion kept and what it lost: figures, and the page that shows them."""
