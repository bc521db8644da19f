
// In MLflow a page is a blob in a sandboxed frame, and a click on any link there does nothing, or leaves the frame blank. So sections are
// scrolled to, and links to other files are plain text.

if (location.protocol === "blob:") {
  for (const link of document.querySelectorAll("a:not([href^='#'])")) link.removeAttribute("href");
  addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#']");
    if (!link) return;
    event.preventDefault();
    document.getElementById(link.getAttribute("href").slice(1)).scrollIntoView();
  });
}
