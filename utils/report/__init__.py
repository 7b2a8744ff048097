"""What people read: tables, pictures, and report.html."""
