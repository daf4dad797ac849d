//! Columns of text.
//!
//! Invariant: no trailing spaces and no colours: what is printed can be piped, diffed and mailed.

/// A table with a head; the first column and those that are not numbers are left-aligned.
pub(super) struct Table {
    rows: Vec<Vec<String>>,
    right: Vec<bool>,
}

impl Table {
    /// A table with these column heads; a head that starts with `>` has numbers below it.
    pub(super) fn new(head: &[&str]) -> Self {
        let right = head.iter().map(|name| name.starts_with('>')).collect();
        let head = head.iter().map(|name| name.trim_start_matches('>').to_owned()).collect();
        Self { rows: vec![head], right }
    }

    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// Every line starts with `indent`.
    pub(super) fn render(&self, indent: &str) -> String {
        let width = |column: usize| {
            self.rows.iter().filter_map(|row| row.get(column)).map(|c| c.chars().count()).max()
        };
        let widths: Vec<usize> = (0..self.right.len()).map(|c| width(c).unwrap_or(0)).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = indent.to_owned();
            for (column, cell) in row.iter().enumerate() {
                let width = widths.get(column).copied().unwrap_or(0);
                let right = self.right.get(column).copied().unwrap_or(false);
                let cell =
                    if right { format!("{cell:>width$}") } else { format!("{cell:<width$}") };
                line += &cell;
                line += "  ";
            }
            text += line.trim_end();
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_without_trailing_spaces() {
        let mut table = Table::new(&["NAME", ">BYTES", "STATE"]);
        table.row(["db1".into(), "7".into(), "running".into()]);
        table.row(["web-frontend".into(), "1024".into(), String::new()]);
        assert_eq!(
            table.render(" "),
            " NAME          BYTES  STATE\n db1               7  running\n web-frontend   1024\n"
        );
    }
}
