"""Tasks and their data, in folders by kind; what is generated or converted is cached outside the repository."""
