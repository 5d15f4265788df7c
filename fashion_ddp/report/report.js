// Tables sort by the title that is pressed: first the highest, or A; again the other way. What is no number comes last.
for (const table of document.querySelectorAll("table.sortable")) {
  const titles = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  titles.forEach((title, column) => {
    const numeric = title.classList.contains("number");
    const button = document.createElement("button");
    button.type = "button";
    button.append(...title.childNodes);
    title.append(button);
    button.addEventListener("click", () => {
      const was = title.getAttribute("aria-sort");
      const down = was ? was === "ascending" : numeric;
      titles.forEach((other) => other.removeAttribute("aria-sort"));
      title.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => {
        const text = row.cells[column].textContent;
        return numeric ? Number((text.match(/-?[\d,]*\.?\d+/) || ["NaN"])[0].replaceAll(",", "")) : text;
      };
      const rows = [...body.rows].map((row) => [key(row), row]);
      rows.sort(([a], [b]) => {
        if (!numeric) return a.localeCompare(b, "en", { numeric: true }) * (down ? -1 : 1);
        if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
        return (a - b) * (down ? -1 : 1);
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}
