"""What a person reads about a run: gates that find fault, and the page that shows it. Nothing here needs torch."""
