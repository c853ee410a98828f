"""Other libraries' extension points."""
