// A click on a query explains it, one on an arrow turns the page.
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-query], button[data-page]');
  if (!button || button.disabled) return;
  const {query, page} = button.dataset;
  trigger('select', query === undefined ? {page: Number(page)} : {query});
});
